"""The reverse process: noise schedules, diffusers' schedulers, the sampling loop and corrections of the predicted noise."""
