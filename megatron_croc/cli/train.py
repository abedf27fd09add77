"""Train: torchrun --nproc-per-node 8 -m megatron_croc.cli.train --recipe croc_7b/pretrain_croc ...

Every fault of the configuration is reported at once, before anything is loaded.
"""

import sys
from collections.abc import Sequence

from megatron_croc.cli.arguments import parse_run
from megatron_croc.config.checks import check_run
from megatron_croc.errors import CrocError
from megatron_croc.log import rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 after a fault the user can mend."""
    try:
        run = parse_run(argv, prog="megatron_croc.cli.train")
        from megatron_croc.parallel.groups import stop_distributed, world_size_from_env

        check_run(run, world_size_from_env(), for_training=True)
        from megatron_croc.training.loop import train

        train(run)
    except CrocError as error:
        if rank() == 0 or not _is_same_everywhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    stop_distributed()
    return 0


def _is_same_everywhere(error: CrocError) -> bool:
    """Faults of the configuration are found on every rank; one of them may speak."""
    from megatron_croc.errors import ConfigError

    return isinstance(error, ConfigError)


if __name__ == "__main__":
    sys.exit(main())
