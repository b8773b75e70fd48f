"""What the tests are made of: real servers and clients on loopback sockets. tests/conftest.py hands them out."""
