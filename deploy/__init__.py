"""What operators deploy: images, launch files, containers, charts, dashboards, and the demo."""
