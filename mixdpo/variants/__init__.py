"""E-steps other than the exact one (M12), and responsibilities that are kept from step to step."""
