"""What a run's records show: plots of loss, routing and code usage."""
