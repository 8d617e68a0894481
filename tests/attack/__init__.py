"""Attacks: inputs that nobody should give, against the rule that nothing goes wrong in silence.

    test_ops.py           mutated arguments of every public op: one sentence, or the plain body's result; on a refusal
                          nothing has changed
    test_guard_pages.py   every tensor at the very end and the very start of its memory, between pages that must not be
                          touched
    test_files.py         mutated images, tars, arrays, folders and caches: images, bad images or one sentence, soon and
                          in little memory
    test_runs.py          a run folder whose files, config.json and checkpoints are mutated, two processes in it, kills:
                          the run goes on and names what was lost, or one sentence says why it cannot
    ops.py                one valid call of every public op, of random sizes, and the mutations
    files.py              valid files of every kind, their mutations, and the process that opens them
    runs.py               the mutations of a run folder, and what may be done with it

Random choices follow FASTSSL_TEST_SEED, which pytest prints with every failure. `make test` runs a short share; the
tests marked exhaustive run every mutation of every argument, and many pairs of them. A new op joins by a line in
`ops.CALLS`: a test fails as long as that lacks one of `fastssl.ops`. A new kind of file joins by a line in
`kinds.KINDS`; image formats join by themselves.
"""
