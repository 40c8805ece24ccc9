"""Weight Dilation and the scaling methods that it is compared with."""
