"""The app: the questions of the command line, answered on a page.  It computes nothing; every number comes from `simulator`."""
