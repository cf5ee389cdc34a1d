"""What prepare.py stands on: tokens and downloads."""
