"""Whether engines are alive and answer correctly; restarts."""
