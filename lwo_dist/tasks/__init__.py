"""What is learned. `base.Task` is the interface; `lwo_dist.registry.TASKS` finds a task by name.

base        the interface of a task
scores      how a task describes its scores, for every table, chart and model card
prepare     prepares a task's examples once and stores them on disk
completion  the next line of code
pairs       from text to text: generation, summarisation, translation, repair, defect detection
metrics     the scores of answers
"""
