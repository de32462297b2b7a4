"""Door 2: searches a space of runs with Ray Tune, and the only package that says `ray`.

    __main__.py     the command line, and what a search shows when it ends
    resources.py    what a trial takes, what there is, and the Ray cluster
    trial.py        one trial: its rank processes, and what they report
    schedulers.py   who is stopped, paused or promoted, in Tune's terms
    driver.py       the loop of Tune around all of them, and how it is interrupted
"""
