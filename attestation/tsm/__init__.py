"""Linux's configfs-tsm, through which a guest asks for reports of either vendor."""
