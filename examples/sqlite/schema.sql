-- Run on each connection before anything else.
CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY,
    customer TEXT,
    product TEXT,
    day INTEGER,
    amount INTEGER
);
