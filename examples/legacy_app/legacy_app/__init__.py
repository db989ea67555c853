"""A mail worker as it was written before anybody started a second one."""
