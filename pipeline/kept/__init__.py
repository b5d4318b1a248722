"""Every engine that is kept on this machine, wherever, and a limit for all of them."""
