"""The pelican: drawings that models make as SVG, checked, rendered, put side by side, and voted on by a person."""
