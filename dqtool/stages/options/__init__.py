"""Options of the stages: one dataclass of annotated fields each, from which the command line and recipes are derived."""
