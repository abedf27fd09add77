"""The training loop."""

import logging
import time
from dataclasses import replace
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_croc.checkpoint.ownership import open_run_folder
from megatron_croc.checkpoint.run_folder import begin_run
from megatron_croc.checkpoint.saving import CheckpointSaver, clear_leftovers
from megatron_croc.config.base import to_tree, to_yaml
from megatron_croc.config.run import RunConfig
from megatron_croc.data.loader import build_train_loader, build_train_plan
from megatron_croc.data.order.row_plan import RowStream
from megatron_croc.log import get_logger, log_on_rank_zero, world_size
from megatron_croc.model.sharded_weights import WeightSource
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.parallel.rank_zero import on_rank_zero
from megatron_croc.training.batch_broadcast import open_batch_broadcast
from megatron_croc.training.build import TrainingState, build_reporter, build_training_state
from megatron_croc.training.evaluate import evaluate
from megatron_croc.training.length import resolve_train_iters
from megatron_croc.training.reporting.profiling import ProfileWindow
from megatron_croc.training.reporting.time_split import TimeSplit
from megatron_croc.training.safety.anomaly import AnomalyGuard
from megatron_croc.training.safety.heartbeat import enter
from megatron_croc.training.safety.stopping import stop_requests
from megatron_croc.training.safety.watchdog import Watchdog, watch_over
from megatron_croc.training.task_answers import evaluate_tasks, open_tasks

logger = get_logger(__name__)


def train(run: RunConfig, weights: WeightSource | None = None) -> TrainingState:
    """Train from the start, or from the last checkpoint, to the end.

    Args:
        run: the run.
        weights: see `build_training_state`.

    Returns:
        the trained state.

    Raises:
        CheckpointError: the folder `save` is another run's, or the last state could not be saved.
        KeyboardInterrupt: the run was stopped by SIGINT, after its step and with a checkpoint.
        RunError: too many steps in a row were not finite, or another rank was lost.
    """
    pg = start_distributed(run.parallel, seed=run.training.seed)
    with open_run_folder(run) as load:
        settings = to_yaml(run)
        run = replace(run, checkpoint=replace(run.checkpoint, load=load))
        clear_leftovers(run.checkpoint)  # before anything is written: the disk may be full
        with watch_over(run.reliability, run.log_folder) as watchdog:
            return _train(run, pg, weights, watchdog, settings=settings)


def _train(
    run: RunConfig,
    pg: ProcessGroupCollection,
    weights: WeightSource | None,
    watchdog: Watchdog,
    *,
    settings: str,
) -> TrainingState:
    """Train; `checkpoint.load` is the folder to resume from, `settings` are those of the user."""
    # Read the tasks to evaluate: their faults are found before the model is built.
    began = time.perf_counter()
    tasks = on_rank_zero(lambda: open_tasks(run))

    # Build model, optimizer and data order, or restore them from the last checkpoint.
    log_on_rank_zero(logger, logging.INFO, "building the model")
    training = build_training_state(run, pg, train_iters=resolve_train_iters(run), weights=weights)
    state, last, folder = training.state, training.train_iters, run.log_folder
    _log_duration("model built in %.1f s, opening the data", began)
    folders = [Path(f) for f in (run.checkpoint.save, folder) if f is not None]

    def begin() -> list[Path]:
        if state.iteration:  # other data is refused before anything is written
            RowStream(build_train_plan(run), state.resume_point())
        return begin_run(run.checkpoint, folders, state, settings)

    others = on_rank_zero(begin)

    # Set up metrics, profiler, anomaly checks and checkpoints.
    times = TimeSplit(run.logging, training.chunks, pg) if run.logging.timing_log_level else None
    reporter = build_reporter(
        run,
        train_iters=last,
        resumed_at=0 if folder in others else state.iteration,
        world_size=world_size(),
        times=times,
    )
    profile = ProfileWindow(run.logging, folder, state.iteration)
    guard = AnomalyGuard(
        run.reliability, state, pg, settings=to_tree(run), train_iters=last, folder=folder
    )
    saver = CheckpointSaver(
        run.checkpoint,
        training.chunks,
        training.optimizer,
        pg,
        settings=settings,
        resumed_at=state.iteration,
    )

    watchdog.first_step = state.iteration + 1

    def is_due(interval: int) -> bool:
        return interval > 0 and (state.iteration % interval == 0 or state.iteration == last)

    with (
        stop_requests(run.reliability) as stop,
        open_batch_broadcast(
            run, pg, build_train_loader, state=state.resume_point()
        ) as broadcaster,
    ):
        began, is_first, is_over = time.perf_counter(), True, state.iteration >= last
        while not is_over:
            # Load the micro-batches of one step.
            started = time.perf_counter()
            enter("waiting for data", iteration=state.iteration + 1)
            batches = broadcaster.next_step()
            waited = time.perf_counter() - started
            if is_first:
                _log_duration("first batch after %.1f s; the first step is the slowest", began)
                is_first = False

            # Train one step, and report it.
            metrics = training.train_step.train(
                batches, training.optimizer, training.scheduler, guard=guard
            )
            state.advance(metrics.num_samples, broadcaster.order_state)
            reporter.add_step(state.iteration, metrics, waited=waited, progress=state.progress())
            profile.after_step(state.iteration)

            # End the run after too many skipped steps, with the last good state saved.
            if guard.gives_up():
                enter("saving a checkpoint", collective="barrier")
                saver.save(guard.last_good)
                raise guard.error(unsaved=saver.close_quietly())

            # Validate.
            if is_due(run.training.eval_interval):
                enter("validation")
                reporter.add_validation(state.iteration, evaluate(training))
                reporter.restart_clock()

            # Evaluate tasks by generation.
            if tasks and is_due(run.training.eval_tasks_interval or run.checkpoint.save_interval):
                enter("evaluating tasks")
                reporter.add_task_metrics(state.iteration, evaluate_tasks(training, tasks))
                reporter.restart_clock()

            # Stop at the last step, or when a signal or a limit asks for it.
            enter("agreeing on whether to stop", collective="all-reduce")
            is_over = state.iteration >= last or stop.agreed(state.iteration)

            # Publish a checkpoint written in the background, and save a new one.
            saver.poll()
            if is_over or is_due(run.checkpoint.save_interval):
                enter("saving a checkpoint", collective="barrier")
                reporter.sync()
                saver.save(state)
                reporter.restart_clock()
        enter("finishing the last checkpoint", collective="all-reduce")
        saver.close()
    profile.close()
    reporter.close()
    stop.raise_if_interrupted()
    return training


def _log_duration(message: str, began: float) -> None:
    log_on_rank_zero(logger, logging.INFO, message, time.perf_counter() - began)
