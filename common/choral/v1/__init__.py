"""Generated from protos/choral/v1 by `make protos`; do not edit."""
