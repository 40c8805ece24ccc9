"""The page that `dqtool report` writes: finding results, measuring artifacts, drawing charts, rendering HTML and Markdown."""
