"""What libraries make no promise about: each one's private parts are used in one module here, and nowhere else."""
