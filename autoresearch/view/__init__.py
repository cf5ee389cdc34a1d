"""What a person sees: events, figures, the terminal, the status, the report."""
