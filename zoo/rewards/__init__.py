"""What a picture is worth. A reward is any function with this signature and these promises:

    reward(images, prompts) -> scores
    images    float [B, 3, H, W] in [0, 1], on the device where they were drawn
    prompts   B strings
    scores    B finite numbers, one for each image; higher is better

    spec.py            how rewards are named on a command line; loads them, checks what they return
    dual_encoders.py   CLIP, PickScore and HPSv2.1     imagereward.py   ImageReward
    example.py         a reward in one line            hpsv3.py         wraps somebody's package

A reward of your own needs no entry: `--reward module:function` names any function. A model that
should have a short name is a function name(place, revision) in a module here, which loads it, and
an entry in MODELS of spec.py.
"""
