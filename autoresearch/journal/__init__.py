"""What git remembers: the history of a study, an experiment, the changes of an edit."""
