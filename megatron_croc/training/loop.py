"""The training loop."""

import time

from megatron_croc.checkpoint.saving import CheckpointSaver
from megatron_croc.config.run import RunConfig
from megatron_croc.data.loader import build_train_loader
from megatron_croc.log import world_size
from megatron_croc.model.sharded_weights import WeightSource
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.build import Trainer, build_trainer
from megatron_croc.training.evaluate import evaluate
from megatron_croc.training.feeder import open_feeder
from megatron_croc.training.length import resolve_train_iters
from megatron_croc.training.reporting import Reporter


def train(run: RunConfig, weights: WeightSource | None = None) -> Trainer:
    """Train from the start (or where the run stopped) to the end; returns the trained state.

    Args:
        run: the run.
        weights: see `build_trainer`.
    """
    pg = start_distributed(run.parallel, seed=run.training.seed)
    trainer = build_trainer(run, pg, train_iters=resolve_train_iters(run), weights=weights)
    reporter = Reporter(run, train_iters=trainer.train_iters, world_size=world_size())
    state, last = trainer.state, trainer.train_iters

    def due(interval: int) -> bool:
        return interval > 0 and (state.iteration % interval == 0 or state.iteration == last)

    saver = None
    if run.checkpoint.save:
        saver = CheckpointSaver(run, trainer.chunks, trainer.optimizer, pg)
    with open_feeder(run, pg, build_train_loader, state=state.resume_point()) as feeder:
        while state.iteration < last:
            started = time.perf_counter()
            batches = feeder.next_step()
            waited = time.perf_counter() - started

            metrics = trainer.stepper.train(batches, trainer.optimizer, trainer.scheduler)
            state.iteration += 1
            state.consumed_samples += metrics.num_samples
            state.order = feeder.order_state
            reporter.add_step(state.iteration, metrics, waited=waited, progress=state.progress())

            if due(run.training.eval_interval):
                reporter.add_validation(state.iteration, evaluate(trainer))
                reporter.restart_clock()
            if saver is not None:
                saver.poll()
                if due(run.checkpoint.save_interval):
                    saver.save(state)
                    reporter.restart_clock()
    reporter.close()
    if saver is not None:
        saver.close()
    return trainer
