"""Parts that every stage uses: options of all commands, the run of a stage, paths, networks of artifacts."""
