"""Door 2: searches a space of runs with Ray Tune, and the only package that says `ray`.

    __main__.py     the command line, and what a search shows when it ends
    resources.py    what a trial takes, what there is, and the Ray cluster
    trial.py        one trial: who trains it, what is reported, why it ended
    seat.py         a trial's share of a node, and the process that trains there
    rank.py         those processes, forked from one that has imported everything
    bell.py         what the driver says to running trials
    schedulers.py   who is stopped, paused or promoted, in Tune's terms
    driver.py       the loop of Tune around all of them, and how it is interrupted
"""
