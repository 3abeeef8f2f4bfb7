"""Topics beyond the printed appendix: a notebook and a module of the same name each."""
