-- One customer's visit, as today's application does it (pgbench). Most visits look; some order, pay, return; few customers are
-- most of the traffic.
\set customer random_zipfian(1, :customers, 1.1)
\set order random(1, :orders)
\set what random(1, 100)
\set cents random(100, 9999)
\if :what <= 40
SELECT first_name, last_name, balance_cents, preferences ->> 'lang' FROM public.customer WHERE customer_id = :customer;
SELECT order_id, sku, quantity, unit_price_cents FROM public.order_line WHERE order_id = :order ORDER BY line_no;
\elif :what <= 65
BEGIN;
UPDATE public.customer SET balance_cents = balance_cents - 2 * :cents - 499 WHERE customer_id = :customer;
INSERT INTO public.orders (customer_id, ship_to, note) VALUES (:customer, 'Straße 1, Köln', 'naïve ☕') RETURNING order_id \gset
INSERT INTO public.order_line (order_id, line_no, sku, quantity, unit_price_cents, discount, attributes) VALUES
    (:order_id, 1, 'SKU-1', 2, :cents, 0.0525, '{"gift": true}'),
    (:order_id, 2, 'SKU-2', 1, 499, NULL, NULL);
COMMIT;
\elif :what <= 80
UPDATE public.orders SET status = 'paid', note = NULL WHERE order_id = :order AND status <> 'paid';
\elif :what <= 90
UPDATE public.customer SET preferences = preferences || '{"newsletter": true}', tags = ARRAY['vip', 'größer'], last_name = 'Müller ' || :cents WHERE customer_id = :customer;
\elif :what <= 95
DELETE FROM public.order_line WHERE order_id = :order AND line_no = 2;
\else
BEGIN;
UPDATE public.orders SET status = 'returned' WHERE order_id = :order;
UPDATE public.order_line SET quantity = quantity + 1, discount = NULL WHERE order_id = :order;
COMMIT;
\endif
