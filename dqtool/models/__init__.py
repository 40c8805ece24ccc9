"""What a diffusion model is: where it comes from, its family, how it samples."""
