"""Pictures of a run, for notebooks: no torch, DeepSpeed or GPU needed, on any run folder, also one being written."""
