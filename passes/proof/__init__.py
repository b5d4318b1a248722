"""May this mask go?  What a mask is, for every length and every content of the inputs."""
