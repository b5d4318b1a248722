"""What a run leaves behind: its report, its pictures, its lines on the console."""
