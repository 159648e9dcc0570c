"""What is learned. `base.Task` is the contract, `lwo_dist.registry.TASKS` finds a task by name.

base        the contract of a task
scores      what a task says of its scores, for every table, chart and model card
prepare     the examples of a task, made once and kept on disk
completion  the next line of code
metrics     scores of text against text, and the interval of a paired difference
"""
