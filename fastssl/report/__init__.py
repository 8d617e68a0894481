"""Report pages. All modules here need the extra `report`."""

from fastssl.extras import need

for _package in ("matplotlib", "jinja2"):
    need(_package, what="report", extra="report")
