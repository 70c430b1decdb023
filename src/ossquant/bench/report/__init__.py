"""Report: results, evaluations and comparisons for people (Markdown, HTML) and for CI (JUnit, benchmark actions)."""
