"""The report of a run: its sections, each from what the stages left behind."""

from collections.abc import Sequence
from pathlib import Path

from megatron_croc.monitoring.run_report.accuracy import answer_sections
from megatron_croc.monitoring.run_report.page import Section, write_page
from megatron_croc.monitoring.run_report.stages import (
    StageRun,
    loss_table,
    optimizer_table,
)


def write_report(run_dir: Path, stages: Sequence[StageRun], *, num_images: int) -> Path:
    """Draw everything into RUN_DIR/report; returns the page's path."""
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    sections = [*answer_sections(stages), curve_section(stages, folder)]
    sections.append(mask_section(stages, folder))
    sections += pool_sections(stages, folder, num_images)
    page = folder / "report.html"
    write_page(
        page,
        title="Croc, three stages: what was learned",
        lead=f"Run `{run_dir.resolve().name}`: {', '.join(stage.name for stage in stages)}. "
        "Every number and picture comes from the metrics, the checkpoints and the held-out data.",
        sections=sections,
    )
    return page


def curve_section(stages: Sequence[StageRun], folder: Path) -> Section:
    """Losses and what the optimizer did."""
    from megatron_croc.monitoring.run_report.curve_figures import (
        draw_losses,
        draw_optimization,
        draw_pool_training,
    )

    pictures = [
        draw_losses(stages, folder / "losses.png"),
        draw_optimization(stages, folder / "optimization.png"),
        draw_pool_training(stages, folder / "pool_training.png"),
    ]
    return Section(
        title="Training",
        paragraphs=[
            "First and last value of each loss (first: at the first line of the log), and the "
            "median throughput. Each stage starts from the weights of the one before it, and may "
            "run at another layout: TP cuts every layer, PP the stack of layers, DP the batch.",
        ],
        tables=[loss_table(stages), optimizer_table(stages)],
        pictures=[picture for picture in pictures if picture is not None],
    )


def mask_section(stages: Sequence[StageRun], folder: Path) -> Section:
    """The three masks on one pack."""
    from megatron_croc.monitoring.run_report.heldout import build_masked_pack
    from megatron_croc.monitoring.run_report.mask_figures import draw_masks

    # The last stage has the most varied samples: several images, or none.
    pack = build_masked_pack(stages[-1].run)
    used = "; ".join(f"{s.name} used `{s.run.model.attention_mask_type}`" for s in stages)
    return Section(
        title="Attention masks",
        paragraphs=[
            "Several samples share one pack, and none sees another. `causal`: every token "
            "sees itself and what is before it. `prefix`: all that stands before a sample's first "
            "answer sees each other. `visual`: the tokens of one image see each other; text stays "
            f"causal. Here {used}.",
            "The pack is made of held-out samples by the code that feeds training, and padded more "
            "than in training, so that padding can be seen: such a token sees itself alone.",
        ],
        pictures=[draw_masks(pack, folder / "masks.png")],
    )


def pool_sections(stages: Sequence[StageRun], folder: Path, num_images: int) -> list[Section]:
    """Sections about the pool tokens; empty when no stage has them."""
    stage = pool_stage(stages)
    if stage is None:
        print("no stage with a prompt pool among --stages: images and pool are left out")
        return []
    from megatron_croc.monitoring.run_report.image_figures import draw_images
    from megatron_croc.monitoring.run_report.observations import observe
    from megatron_croc.monitoring.run_report.pool_figures import (
        NUM_PATCHES,
        draw_strips,
        draw_usage,
    )

    seen = observe(stage)
    pool = stage.run.model.prompt_pool
    used = int((seen.counts > 0).sum())
    replaced = f"{float(seen.similarity[seen.replaced].mean()):.3f}"
    kept = f"{float(seen.similarity[~seen.replaced].mean()):.3f}"
    baseline = f"{float(seen.baseline[seen.replaced].mean()):.3f}"
    images = Section(
        title="Replaced tokens and their reconstruction",
        paragraphs=[
            f"Each held-out image becomes {seen.grid} x {seen.grid} visual tokens; "
            f"{pool.replace_ratio:.0%} of them are replaced by rows of the pool "
            f"(`{pool.assign_mode}` matching) before the language model reads them. From its "
            "hidden states the head rebuilds every original token, replaced or not. A pool row has "
            "the same colour and number in every image.",
            f"Mean cosine similarity over {len(seen.pixels)} held-out images: "
            f"{replaced} for replaced tokens, {kept} for kept ones. To compare: a head that always "
            f"answered with the average token of the position would reach {baseline} on the "
            "replaced ones.",
        ],
        pictures=[draw_images(seen, num_images, folder / "images.png")],
    )
    print(
        f"pool: {used} of {pool.pool_size} rows matched over {len(seen.pixels)} held-out images; "
        f"similarity of the rebuilt tokens {replaced} replaced, {kept} kept ({baseline} by the "
        "average token)"
    )
    usage = Section(
        title="The pool of prompt tokens",
        paragraphs=[
            f"{used} of {pool.pool_size} rows ({used / pool.pool_size:.1%}) were matched at least "
            f"once over {len(seen.pixels)} held-out images. `hungarian` matching gives a row to "
            "one token of an image at most, `nearest` to any number.",
            "A pool drawn with `pool_init: randn` has rows much longer than the visual tokens, "
            "whose length is 1: mostly the shortest rows are used, and the image only decides "
            "which token gets which of them. With `pool_init: unit` all rows start at length 1; "
            f"this run used `{pool.pool_init}`.",
            "Below, what the most used rows were matched with: where in the image, the mean of all "
            f"patches, and {NUM_PATCHES} patches spread evenly over the held-out images.",
        ],
        pictures=[
            draw_usage(seen, folder / "pool_usage.png"),
            draw_strips(seen, folder / "pool_patches.png"),
        ],
    )
    return [images, usage]


def pool_stage(stages: Sequence[StageRun]) -> StageRun | None:
    """The stage that has a prompt pool, if any."""
    return next((stage for stage in stages if stage.run.reconstructs), None)
