"""Licences as SPDX expressions."""

from __future__ import annotations


def to_spdx(license: str) -> str | None:
    """Return a licence as an SPDX expression in its canonical spelling, or None if it is none."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return str(canonicalize_license_expression(license))
    except InvalidLicenseExpression:
        return None
