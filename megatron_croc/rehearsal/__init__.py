"""Rehearsal of a training step of any job on a CPU: its true CUDA path on tensors without data.

    run        the parent: one child process for each class of rank, then the report
    classes    the ranks that stand for all others
    rank       the child: model, DDP, optimizer, a step, validation and saving of one rank
    fake_*     a CUDA device without memory, and process groups without peers
    kernels    the kernels that a CPU build of torch lacks, as shapes
    ledger     memory by purpose and operations by kind
    report     what was found, for the terminal, as JSON and as a page

Only child processes of `croc rehearse` import the fakes: they change torch for the whole process.
"""
