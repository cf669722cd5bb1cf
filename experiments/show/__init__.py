"""Tables, pictures and pages of runs and studies."""
