-- The store that replaces it, on the second server: other names, other types, names and addresses joined and split, money in
-- another unit. Empty. Stock PostgreSQL, no extension.

CREATE SCHEMA sales;

CREATE TABLE sales.client (
    client_id bigint PRIMARY KEY,
    ref       uuid NOT NULL,
    full_name text NOT NULL,
    email     varchar(200),
    balance   numeric(14,2) NOT NULL,
    labels    text[],
    settings  jsonb NOT NULL,
    joined    timestamptz NOT NULL
);

CREATE TABLE sales.purchase (
    purchase_id bigint PRIMARY KEY,
    client_id   bigint NOT NULL REFERENCES sales.client,
    state       text NOT NULL CHECK (state IN ('new', 'paid', 'shipped', 'returned')),
    placed_at   timestamptz NOT NULL,
    street      text NOT NULL,
    city        text NOT NULL,
    note        text
);
CREATE INDEX ON sales.purchase (client_id);

CREATE TABLE sales.item (
    purchase_id      bigint NOT NULL REFERENCES sales.purchase,
    position         integer NOT NULL,
    article          text NOT NULL,
    amount           bigint NOT NULL,
    unit_price       numeric(12,2) NOT NULL,
    discount_percent numeric(6,2),
    attributes       jsonb,
    PRIMARY KEY (purchase_id, position)
);
