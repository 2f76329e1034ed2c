from tests.services.conftest import postgresql

__all__ = ["postgresql"]
