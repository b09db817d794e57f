"""Does it pay? InstructMining's central claim on a real LLaMA and real rows, by `scripts/study` (docs/study_plan.md).

Every stage is a command of this package on fixed inputs, so each goes on where it was interrupted:

    split    draws pool, fit, search and verdict sets from files of rows        sets.py
    score    im-lightning score
    rate     finetunes on random rows at three learning rates; the search sets choose
    runs     im-lightning design, sweep
    refit    im-lightning refit, mix
    transfer im-lightning transfer: some of the subsets at another rank and rate
    merged   im-lightning design --kind merged, sweep: mixtures of the adapters of a few blocks
    compare  im-lightning compare, on the verdict sets
    beside   the same with other arms, all weights, a curve, more tokens
    cheap    the same with rules of cheaper evidence: runs that end early, merged ones
    tables   what docs/study.md says, from the numbers kept in docs/study/      kept.py, tables.py
"""
