"""Back ends: from QDQ form to operators on packed codes, and from those to other runtimes."""
