"""The training core: what the scripts in `training/` share.

config, pictures, data          settings, pictures on disk, the rows and randomness of a step
objective, loop, muon           the mathematics, the loop (a generator), an optimizer
checkpoint, run                 save and resume; a run from its first step to its last
encoders                        latents and token states, once
lesson, preflight, finetune, methods   fine-tuning: its data, its cost, its loss, what learns
"""
