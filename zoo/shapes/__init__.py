"""The embedded world: everything `python train.py` runs on when it is given no other model.

    world.py             the prompts (a grammar) and pictures of them, drawn at random
    rule.py              reads a picture and scores it by a prompt: the default reward
    model.py             the velocity field, 0.60 M parameters; its weights are shapes.safetensors,
                         and before.safetensors how they are judged before any training
    pretrain.py          makes those weights                   python -m zoo.shapes.pretrain
    gradient_signal.py   where is the gradient not noise?      python -m zoo.shapes.gradient_signal

A new colour, shape, count or relation is an entry in the tables at the head of world.py; a new
shape also needs its outline there. Prompts and words then change, so the model must be pretrained
anew.
"""
