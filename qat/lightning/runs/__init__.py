"""The run of the command line: its stages from config to proof, what it shares with others, and how it resumes."""
