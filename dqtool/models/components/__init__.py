"""Components of a pipeline that stay float (text encoders, autoencoder), and the layout of an exported directory."""
