"""A whole run: its settings, its programs, its folder, and how it ends or goes on."""
