"""Text-to-image flows as they were released, read by diffusers: SD3 and FLUX.

    pipeline.py            Flow: what every family is, and what they share
    sd3.py, flux.py        what each family does in its own way
    families.py            the registry, and loading by it
    tuning.py              which weights are trained, and what is saved of them
    random_pipelines.py    pipelines of the real classes without a download

To add a family, write a subclass of Flow in a file of its own and enter it in families.FAMILIES;
its tests need a maker in random_pipelines.py.

diffusers, transformers and peft take seconds to import, and runs of the embedded model do without
them: every module but random_pipelines.py imports them in the functions that need them.
"""
