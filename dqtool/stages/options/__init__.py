"""What each stage can be told: one dataclass of annotated fields a stage, from which the command line and recipes are derived."""
