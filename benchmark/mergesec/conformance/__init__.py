"""One battery for every component, built in or a stranger's."""
