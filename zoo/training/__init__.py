"""What train.py is made of: everything about a run but the loop itself.

options.py         every option, a field each: to add an option, add a field there and use it
command_line.py    from flags to checked options
policies.py        what is aligned: the embedded model, or a released one
prompts.py         what is asked, with the noise that belongs to each question
ranks.py           processes that share the prompts
costs.py           what an iteration costs, before it is spent
metrics.py         what is measured of an iteration: to add a metric, add it to `measure`
draw.py            pictures by the ODE; a program: python -m zoo.training.draw
evaluate.py        held-out judgement; a program: python -m zoo.training.evaluate
shipped.py         what it gives before training; a program: python -m zoo.training.shipped
run.py             the folder a run leaves
pictures.py        its pictures; a program: python -m zoo.training.pictures
"""
