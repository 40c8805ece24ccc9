"""Full-precision models: how the name that a user gives becomes weights, a config and a noise schedule.

`resolve.resolve_model` is the entry. It accepts diffusers directories, single files, original checkpoints (`original/`) and Hub
ids, and returns a `model_source.ModelSource`. `lora` merges LoRAs into the weights that it names.
"""
